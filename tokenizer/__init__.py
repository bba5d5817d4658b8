"""Images, videos and annotations to visual sentences of VQGAN tokens, and back."""
