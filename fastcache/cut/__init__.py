"""A diffusers U-Net -> the two modules of DeepCache: full and shallow."""
