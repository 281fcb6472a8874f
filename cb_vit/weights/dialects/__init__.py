"""Other codebases' names for a Vision Transformer: of parameters, settings and preprocessing, both ways."""
