"""The studies that results/ reports."""
