"""The networks: autoencoder, DiT, patch discriminator, frozen text encoder. They know no training and no data format."""
