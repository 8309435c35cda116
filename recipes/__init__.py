"""Recipes: YAML configurations for the `glai` command, with a method card for each."""
