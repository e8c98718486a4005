"""The names of the weights of k-diffusion's UNet, which are published in the layout of diffusers alone."""

OURS, THEIRS = "time_embed.frequencies", "time_proj.weight"  # which no other UNet has

# (our prefix, theirs), as in ldm.checkpoint.diffusers.
K_UNET = [(OURS, THEIRS), ("time_embed.cond.", "time_embedding.cond_proj."), ("time_embed.", "time_embedding."),
          ("input_blocks.", "down_blocks."), ("output_blocks.", "up_blocks."), ("conv_in.", "conv_in."),
          ("conv_out.", "conv_out.")]  # fmt: skip
