"""Comparing arms over seeds at an equal number of scores, and searching, with Ray Tune."""
