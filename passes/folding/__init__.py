"""What fold rewrites: affine maps into the layer beside them, constants, calls that do nothing."""
