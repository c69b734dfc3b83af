"""Every sparse autoencoder and dictionary on the same features, judged by the same measures."""
