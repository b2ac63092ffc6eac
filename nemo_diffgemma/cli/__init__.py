"""What the verbs of launch/ and export/ share: Hydra, processes, Slurm jobs, results and errors."""
