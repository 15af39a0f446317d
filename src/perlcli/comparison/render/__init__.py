"""A comparison report in all its forms: terminal, Markdown, CSV, pictures and HTML."""
