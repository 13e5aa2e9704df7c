"""Files and values that are not what they should be, as hypothesis draws them."""

import copy

from hypothesis import settings
from hypothesis import strategies as st

fixed = settings(derandomize=True, deadline=None, database=None, max_examples=100)
# what stands where something else should
ODD = [
    *(None, True, False, -1, 0, 3, 2**31, 2**40, 2**63, -(2**63), 10**400),
    *(0.5, -0.0, 1e308, float("nan"), float("inf"), -float("inf")),
    *("", "x", "Z\n\udce9", "1", "sdpa", [], [[]], [1], ["x"], {}, {"x": 1}),
]
CHANGE = st.tuples(st.integers(0, 10**6), st.sampled_from(range(len(ODD) + 1)))


def paths(value, before=()):
    """Yield where everything in nested dicts and lists stands, a few entries of each list."""
    inside = value.items() if isinstance(value, dict) else ()
    if isinstance(value, list):
        inside = list(enumerate(value))[:3]
    for key, part in inside:
        yield (*before, key)
        yield from paths(part, (*before, key))


def changed(value, change, odd=ODD):
    """Return a copy in which one thing is another, or is missing."""
    which, what = change
    value = copy.deepcopy(value)
    places = list(paths(value))
    *above, last = places[which % len(places)]
    at = value
    for key in above:
        at = at[key]
    if what < len(odd):
        at[last] = odd[what]
    else:
        del at[last]
    return value


def refused(path, read):
    """Return what is read, or None if the file is refused, in one line that names it."""
    reason = ""
    try:
        return read()
    except ValueError as error:
        reason = str(error)
    assert path.name in reason
    assert reason.isprintable()
    return None
