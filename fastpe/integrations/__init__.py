"""fastpe inside other packages, one module each; fastpe itself imports none of them."""
