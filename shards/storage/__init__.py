"""Where bytes lie: patterns of a config, local and remote files, atomic writes."""
