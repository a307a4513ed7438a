"""`cavmae explore`: a page on loopback to look at a trained model and listen to it."""
