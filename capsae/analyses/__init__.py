"""What the SAE leaves out, what its latents mean and do: one module for each chapter."""
