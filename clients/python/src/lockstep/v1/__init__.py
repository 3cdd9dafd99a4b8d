"""The contract as the build generates it from `proto/lockstep/v1`: its comments are the reference of every field."""
