"""The OpenAI-compatible service: agents that speak HTTP get relayed prefill by changing one URL.

settings.py   knobs              tenants.py    API keys -> tenants
schemas.py    what clients send  errors.py     what they get when it cannot be done
matching.py   texts in a prompt  memory.py     messages -> prompt with slots, answers remembered
places.py     bounded queue      answering.py  one request on a worker, from an event loop
service.py    puts them in order api.py        HTTP routes; replies.py  what goes back
app.py        the ASGI app on a cluster, under uvicorn; deployment.py: under Ray Serve
"""
