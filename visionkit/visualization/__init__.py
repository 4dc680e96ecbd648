"""Pictures for people: what is in the data, and what a model found."""
from visionkit.visualization.draw import class_color, contact_sheet, draw_instances, draw_panoptic, save_image, side_by_side
from visionkit.visualization.neighbours import draw_neighbours

__all__ = ["class_color", "contact_sheet", "draw_instances", "draw_neighbours", "draw_panoptic", "save_image", "side_by_side"]
