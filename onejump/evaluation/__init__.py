"""How good generated images are: `features` of them, `metrics` on features, and the classifier of the digits."""
