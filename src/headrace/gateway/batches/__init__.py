"""Files and batches, as OpenAI has them: a file of requests goes in, a file of answers comes out, each line once.

`Depot` is the folder that holds everything. `api.answer` is the HTTP face over it, `asgi.App` puts that behind a server, and
`Worker` carries batches out through a function that sends one line to an engine. Any number of processes may do either.
"""
