"""A trained model applied to files, arrays and pictures: what `cavmae.load` returns."""
