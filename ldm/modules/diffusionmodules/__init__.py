"""The UNet, the autoencoder's encoder and decoder, and their parts."""
