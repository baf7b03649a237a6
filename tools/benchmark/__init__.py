"""What a correlated posterior costs in time, against what else one could use (notebook 08).

`clock` measures; `draws`, `conditioning`, `densities`, `training` and `scans` hold what is
measured, in the order of the notebook's sections.
"""
