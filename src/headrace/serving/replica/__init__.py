"""A replica: frames from doors on one side, the pipeline's stages on the other."""
