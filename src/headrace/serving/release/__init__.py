"""Which versions of a service answer, with how many replicas, and whether a new one is any worse. Pure: values in, values out."""
