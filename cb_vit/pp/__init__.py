"""Preprocessing written as a string of ops; see `cb_vit.pp.builder.build`."""
