"""Generated messages and services of package pageframe.v1."""
