"""Where the jobs of an experiment run: on this machine, on a Ray cluster, or under SLURM through submitit."""
