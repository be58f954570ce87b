"""Connections to servers and files, shared by the broker and the result store on them."""
