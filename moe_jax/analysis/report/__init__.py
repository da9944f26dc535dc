"""A run, or several, as one page that opens without a network: what was trained, how it learned, where its tokens went and why.

`runs` reads run folders, `markup` escapes and nests, `pictures` draws, the modules named after topics make a section each, `write` puts
the page together.
"""
