"""The main job: the algorithms on real text, with tables and pictures."""
