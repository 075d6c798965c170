"""Every setting, its type, default, meaning and bounds. The ground floor: may import nothing else of this project.

settings  reads YAML and command-line overrides into dataclasses, strictly
data      the sections data and eval
modes     all other sections, and what has to fit together in strided and in structured mode
"""
