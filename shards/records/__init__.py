"""Raw bytes, or rows of Arrow files -> documents."""
