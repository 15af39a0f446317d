"""A comparison report as tables, Markdown, CSV, pictures and a HTML page."""
