"""What every page and figure shares: templates, style, SVG, tables."""
