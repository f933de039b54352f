"""What type checkers say of code that uses the package; run by `nox -s typecheck`."""
