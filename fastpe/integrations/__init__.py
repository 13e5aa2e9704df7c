"""fastpe inside other packages, one module for each; fastpe itself never imports those packages."""
