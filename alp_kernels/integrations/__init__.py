"""alp_kernels inside other people's trainers: one module a trainer, each imported by the user who has that trainer."""
