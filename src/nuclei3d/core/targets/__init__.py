"""Flow targets by heat diffusion: what the network learns."""
