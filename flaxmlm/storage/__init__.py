"""Where runs and stores are kept: folders here, or in a bucket."""
