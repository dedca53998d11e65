"""Its place makes `models` importable: pytest puts the folder of a conftest on the path."""
