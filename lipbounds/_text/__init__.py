"""What every room may use: tables, HTML, progress, files, the boundary of a public call, the version."""
