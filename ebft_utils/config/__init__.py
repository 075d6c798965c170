"""Every setting, its type, default, meaning and bounds. The ground floor: may import nothing else of this project.

settings  reads YAML and command-line overrides into dataclasses, strictly
data      the sections data and eval, and what has to fit together in them
sections  all other sections: model, lora, feature_network, ebft, train, vllm
names     what is said of an unknown key: other trainers' names and where the setting is here
modes     the whole configuration of a mode, what has to fit together in it, and the command line
command   the command line checked before a script's slow imports
"""
