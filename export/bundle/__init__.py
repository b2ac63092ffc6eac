"""The artefact: its format, building, opening and comparing one, and what is written for other servers."""
