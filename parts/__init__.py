"""What the tabs have in common, without Gradio: the words and looks of jobs, and the console lines that do the same.

Tabs never import each other; this they may. Imports nothing but `nibble`.
"""
