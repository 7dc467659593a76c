"""Where bytes are: patterns of a config, local and remote files, atomic writes."""
