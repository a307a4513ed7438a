"""The page of `cavmae explore`, in a browser."""
