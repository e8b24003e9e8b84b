"""Pages: self-contained HTML files with a strict content policy, tables, and plots as SVG."""
