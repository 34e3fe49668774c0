"""Publishing a weight version and reading it back."""
