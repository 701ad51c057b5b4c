"""Scripts for maintainers that measure no time; tools/README.md lists them."""
