"""The engines that are compared, one file each, behind `base.Sampler`."""
