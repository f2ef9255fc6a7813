"""Published networks that stand beside a diffusion model, frozen: autoencoders, text and image encoders, feature networks."""
