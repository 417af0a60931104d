from gspn_jax.classify import main

main()
